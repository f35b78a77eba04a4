#!/bin/bash
# Startup script of every host of a TPU pod: trains until the run is finished or has failed. tpu_pod.sh sends it to the hosts.
RUN=gs://BUCKET/cifar10
IMAGE=REGION-docker.pkg.dev/PROJECT/images/diffusion_jax

export HOME=/root
gcloud auth configure-docker "${IMAGE%%/*}" --quiet
code=1
for _ in {1..20}; do # a run that fails after each relaunch must not do so forever
  docker run --rm --privileged --network=host --stop-timeout=60 \
    --volume=/var/tmp:/scratch --env=TMPDIR=/scratch --env=XDG_CACHE_HOME=/scratch \
    "$IMAGE" diffusion-jax --config=cifar10 --workdir="$RUN" \
    --config.data.data_dir=gs://BUCKET/tfds --config.training.steps_per_call=10
  code=$?
  case $code in
    69 | 75 | 134 | 137 | 143) sleep 10 ;;
    *) break ;;
  esac
done
[ "$code" = 0 ] || echo "$HOSTNAME exited with $code" | gcloud storage cp - "$RUN.failed"
exit "$code"
