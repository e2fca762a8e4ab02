# Training and sampling in a container, with the tested versions. docs/scaling.md shows its use.
FROM python:3.12-slim
# The source stays: it has the shipped model and the documents.
WORKDIR /opt/ddpm_hf
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[train,eval]"
WORKDIR /work
# A container may run as a user without a home or a name.
ENV HF_HOME=/work/outputs/.huggingface MPLCONFIGDIR=/tmp/matplotlib TORCHINDUCTOR_CACHE_DIR=/tmp/inductor USER=ddpm
ENTRYPOINT ["ddpm-train"]
