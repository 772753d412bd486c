# CPU:  docker build -t cocomix --build-arg TORCH_INDEX=URL .
# CUDA: docker build -t cocomix --build-arg BASE=IMAGE .
#
# URL is the index of PyTorch's CPU builds; without it, pip takes the larger CUDA build. IMAGE has Python 3.11 or newer
# and PyTorch 2.11 or newer with CUDA, such as one of pytorch/pytorch. Its PyTorch is kept; torch.compile needs a C
# compiler, which its devel images have. Run it with --gpus all.
ARG BASE=python:3.12-bookworm
FROM ${BASE}

ARG TORCH_INDEX=
ARG EXTRAS=app,sae,eval

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY src src
RUN python3 -m venv --system-site-packages /opt/cocomix \
    && /opt/cocomix/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[${EXTRAS}]" \
    && useradd --create-home --uid 10001 cocomix

ENV PATH=/opt/cocomix/bin:${PATH}
USER 10001
WORKDIR /home/cocomix
ENTRYPOINT ["cocomix"]
CMD ["--help"]
