# The server on a CPU.  docker build -t plainsd . && docker run -p 127.0.0.1:7860:7860 -v plainsd:/data plainsd
# It listens beyond its own machine, so it needs a token: give PLAINSD_TOKEN, or read the one it prints.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt ".[serve]" \
    && useradd --create-home plainsd && install -d -o plainsd /data
USER plainsd
VOLUME /data
EXPOSE 7860
HEALTHCHECK CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/healthz', timeout=5)"
ENTRYPOINT ["plainsd", "serve", "--host", "0.0.0.0", "--data", "/data"]
