# The load balancer in a container. docs/deploy.md says how it is run, and what was tried.
ARG PYTHON=3.14

FROM python:${PYTHON}-slim AS build
WORKDIR /source
RUN python -m venv --without-pip /opt/load-balancer
# First what seldom changes, so that a build after an edit has it already.
COPY requirements.txt ./
RUN pip --python /opt/load-balancer install --no-cache-dir --requirement requirements.txt
COPY . .
# hadolint ignore=DL3013
RUN pip --python /opt/load-balancer install --no-cache-dir ".[tls,auth,redis]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/load-balancer /opt/load-balancer
RUN install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/load-balancer
# Beside others on a machine each would pin itself to the same CPU.
ENV PATH=/opt/load-balancer/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LB_HOST=0.0.0.0 \
    LB_STATE_FILE=/var/lib/load-balancer/state.db \
    LB_CPU_AFFINITY=none
WORKDIR /var/lib/load-balancer
USER 10001:10001
EXPOSE 9000
STOPSIGNAL SIGTERM
# It asks with the settings of the environment: flags of the command are not known to it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s CMD ["load-balancer", "--probe"]
ENTRYPOINT ["load-balancer"]
