# The image for launch/gke_jobset.sh and launch/xpk.sh, with the installed repository as working directory.
#
#   docker build --tag REGION-docker.pkg.dev/PROJECT/REPO/stepjax:1 .
#   docker build --build-arg EXTRAS=cuda13 --tag stepjax:cuda .
FROM python:3.12-slim-bookworm

ARG EXTRAS=tpu,tracking
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /stepjax

# Requirements first, so that a code change reinstalls nothing.
COPY pyproject.toml README.md ./
COPY stepjax/__init__.py stepjax/
COPY pallas_kernels/__init__.py pallas_kernels/
RUN pip install --editable ".[${EXTRAS}]"

COPY . .
CMD ["stepjax", "--help"]
