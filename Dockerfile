# The server on a CPU.  docker build -t plainsd . && docker run -p 127.0.0.1:7860:7860 -v plainsd:/data plainsd
# It listens beyond its own machine, so it needs a token: give PLAINSD_TOKEN, or read the one it prints.
# For a cluster, front and workers alike (deploy/): docker build -t plainsd-cluster --build-arg EXTRAS=serve,cluster .
# For GPUs of NVIDIA, with the CUDA build of torch: --build-arg TORCH=https://pypi.org/simple
FROM python:3.12-slim
ARG EXTRAS=serve
ARG TORCH=https://download.pytorch.org/whl/cpu
# g++ compiles the kernels for the processor it runs on; KubeRay's probes call wget
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url $TORCH --constraint constraints.txt ".[$EXTRAS]" \
    && useradd --create-home --uid 1000 plainsd && install -d -o plainsd /data
USER plainsd
VOLUME /data
EXPOSE 7860
HEALTHCHECK CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/healthz', timeout=5)"
ENTRYPOINT ["plainsd", "serve", "--host", "0.0.0.0", "--data", "/data"]
