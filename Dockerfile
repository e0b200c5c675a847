# One image, two verbs: `train` (also without an argument) and `serve`; any other verb of
# `python -m dreambooth` works too. torch brings its own CUDA libraries, so the image needs no CUDA
# base: it runs with `--gpus all` and on a CPU.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# A torch for older drivers: --build-arg TORCH_INDEX=<an index with a CUDA 12 build of this torch>.
ARG TORCH_INDEX=""

LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port="true"

# Caches go where any user can write, also under a read-only root file system.
ENV PYTHONUNBUFFERED=1 \
    PYTHONPATH=/opt/dreambooth \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/tmp/dreambooth-cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/dreambooth-cache/inductor \
    TRITON_CACHE_DIR=/tmp/dreambooth-cache/triton \
    XDG_CACHE_HOME=/tmp/dreambooth-cache

WORKDIR /opt/dreambooth

# The heavy layer: rebuilt only when the requirements change. Of torch, C++ tests and headers stay out.
COPY requirements.txt ./
COPY requirements/clip-vocabulary.txt requirements/
RUN if [ -n "$TORCH_INDEX" ]; then \
      pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep -o '^torch==[^ ]*' requirements.txt)"; \
    fi \
 && pip install --no-cache-dir -r requirements.txt \
 && pip install --no-cache-dir --no-deps -r requirements/clip-vocabulary.txt \
 && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && rm -rf torch/test torch/include

# What cannot be read by any user is made so; the rest is not copied into a second layer.
COPY . ./
RUN python -m compileall -q dreambooth transfer_learning.py inference.py \
 && find . \( ! -perm -444 -o -type d ! -perm -555 \) -exec chmod a+rX {} +

ENTRYPOINT ["python", "-m", "dreambooth"]
CMD ["train"]
