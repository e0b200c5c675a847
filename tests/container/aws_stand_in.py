"""Stands in for AWS's endpoints: notes each call and answers as if everything had succeeded.

`aws_stand_in.py [ADDRESS]` prints its own address, then one JSON line `[operation, request]` for
each call of SageMaker's API. It passes InvokeEndpoint, InvokeEndpointAsync and the objects of a
batch transform on to our server at ADDRESS; S3's objects are kept in memory. Clients find it by the
variable AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ARN = "arn:aws:sagemaker:us-east-1:111111111111:thing/name"
MADE = ("TrainingJob", "TransformJob", "HyperParameterTuningJob")
MADE = (*MADE, "Model", "EndpointConfig", "Endpoint")
RESOURCES = {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
# Replies to what a client polls until a job is done.
DESCRIBED: dict[str, dict[str, Any]] = {
    "DescribeTrainingJob": {
        "TrainingJobName": "job",
        "TrainingJobStatus": "Completed",
        "SecondaryStatus": "Completed",
        "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/out/job/output/model.tar.gz"},
        "ResourceConfig": RESOURCES,
    },
    "DescribeEndpoint": {"EndpointStatus": "InService", "EndpointConfigName": "name"},
    "DescribeEndpointConfig": {"ProductionVariants": [{"ModelName": "model"}]},
    "DescribeTransformJob": {"TransformJobStatus": "Completed", "TransformResources": RESOURCES},
    "DescribeHyperParameterTuningJob": {"HyperParameterTuningJobStatus": "Completed"},
    "DescribeLogStreams": {"logStreams": []},
}
OBJECTS: dict[str, bytes] = {}
"""Contents of S3 by bucket and key, such as `bucket/folder/name`."""
ASYNC_OUTPUTS: list[str] = []
"""Where the replies of the asynchronous endpoints go, such as `s3://bucket/folder`."""


class Aws:
    """Runs the AWS stand-in.

    environ: variables that lead clients to it. calls: the calls made.
    """

    def __init__(self, server: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, server], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.environ = {
            "AWS_ENDPOINT_URL": self._process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "no_proxy": "127.0.0.1",
        }
        self.calls: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Aws:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        said, _ = self._process.communicate(timeout=30)
        for line in said.splitlines():
            operation, request = json.loads(line)
            self.calls.setdefault(operation, []).append(request)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # S3's clients wait for its "100 Continue"

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/async-invocations"):
            self.invoke_later()
            return
        if self.path.startswith("/endpoints/"):
            self.invoke(body)
            return
        operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
        if operation:
            request = json.loads(body)
            print(json.dumps([operation, request]), flush=True)
            if operation == "CreateTransformJob":
                transform(request)
            elif "AsyncInferenceConfig" in request:
                ASYNC_OUTPUTS.append(
                    request["AsyncInferenceConfig"]["OutputConfig"]["S3OutputPath"]
                )
        created = {f"{kind}Arn": ARN for kind in MADE}
        self.answer(json.dumps(DESCRIBED.get(operation, created)).encode())

    def do_PUT(self) -> None:
        OBJECTS[self.path.lstrip("/")] = self.body()
        self.answer(b"")

    def do_GET(self) -> None:
        found = OBJECTS.get(self.path.lstrip("/"))
        self.answer(found or b"", status=404 if found is None else 200)

    do_HEAD = do_GET

    def invoke(self, body: bytes) -> None:
        status, reply, kind = ask(body, self.headers["Content-Type"], self.headers["Accept"])
        if status == 200:
            self.answer(reply, kind)
            return
        told = f'Received client error ({status}) from primary with message "{reply.decode()}"'
        refusal = {"OriginalStatusCode": status, "OriginalMessage": reply.decode(), "Message": told}
        self.answer(json.dumps(refusal).encode(), status=424, **{"x-amzn-ErrorType": "ModelError"})

    def invoke_later(self) -> None:
        """Draw at once; the client asks S3 for the reply later."""
        place, kind, accept = (
            self.headers[f"X-Amzn-SageMaker-{name}"]
            for name in ("InputLocation", "Content-Type", "Accept")
        )
        _, reply, _ = ask(OBJECTS[place.removeprefix("s3://")], kind, accept)
        written = f"{ASYNC_OUTPUTS[-1]}/{uuid.uuid4()}.out"
        OBJECTS[written.removeprefix("s3://")] = reply
        headers = {"X-Amzn-SageMaker-OutputLocation": written}
        self.answer(b'{"InferenceId": "1"}', status=202, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(
        self,
        body: bytes,
        kind: str = "application/x-amz-json-1.1",
        status: int = 200,
        **headers: str,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def ask(body: bytes, kind: str, accept: str) -> tuple[int, bytes, str]:
    """Return our server's status, reply and content type."""
    headers = {"Content-Type": kind, "Accept": accept}
    request = urllib.request.Request(f"{sys.argv[1]}/invocations", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return 200, reply.read(), reply.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def transform(job: dict[str, Any]) -> None:
    """Write the reply to each object of a batch transform's folder."""
    given, wanted = job["TransformInput"], job["TransformOutput"]
    source = given["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://")
    target = wanted["S3OutputPath"].removeprefix("s3://").rstrip("/")
    for place in [place for place in OBJECTS if place.startswith(source)]:
        _, reply, _ = ask(OBJECTS[place], given["ContentType"], wanted["Accept"])
        OBJECTS[f"{target}/{place.removeprefix(source)}.out"] = reply


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        print(f"http://127.0.0.1:{listener.server_port}", flush=True)
        listener.serve_forever()
