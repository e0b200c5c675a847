"""Stands in for AWS's endpoints: prints each call and answers as if everything had succeeded.

`aws_stand_in.py [ADDRESS]` prints its own address, then one JSON line `[operation, request]` for
each call of SageMaker's API. It passes InvokeEndpoint on to our server at ADDRESS. Clients find it
by the variable AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import json
import sys
import urllib.request
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


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/endpoints/"):
            self.pass_on(body)
            return
        operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
        if operation:
            print(json.dumps([operation, json.loads(body)]), flush=True)
        created = {f"{kind}Arn": ARN for kind in MADE}
        self.answer(json.dumps(DESCRIBED.get(operation, created)).encode())

    def pass_on(self, body: bytes) -> None:
        kept = {name: self.headers[name] for name in ("Content-Type", "Accept")}
        request = urllib.request.Request(f"{sys.argv[1]}/invocations", body, kept)
        with urllib.request.urlopen(request, timeout=60) as reply:
            self.answer(reply.read(), reply.headers["Content-Type"])

    def answer(self, body: bytes, kind: str = "application/x-amz-json-1.1") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        print(f"http://127.0.0.1:{listener.server_port}", flush=True)
        listener.serve_forever()
