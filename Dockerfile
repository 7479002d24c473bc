FROM python:3.11-slim

# torch.compile calls a C++ compiler
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vip
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY vip vip
RUN pip install --no-cache-dir -c constraints.txt '.[demo,export,fast,logging,plots]'

# what is not part of the package
COPY train.py validate.py generate_label.py distributed_train.sh eval.sh ./
COPY models models
COPY studies studies

RUN useradd --create-home --uid 1000 vip && mkdir /workspace && chown vip /workspace
USER vip
WORKDIR /workspace
ENTRYPOINT ["vip"]
CMD ["--help"]
