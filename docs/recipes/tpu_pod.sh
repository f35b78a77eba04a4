#!/bin/bash
# Runs on your machine: asks for a TPU pod of Spot VMs, asks again after each preemption, and deletes it at the end of the run.
RUN=gs://BUCKET/cifar10
LAST=$RUN/checkpoints/800000/digests.json # of the last step, training.num_steps
PLACE=(--project=PROJECT --zone=us-west4-a)
POD=(--accelerator-type=v5litepod-32 --runtime-version=v2-alpha-tpuv5-lite --spot --node-id=diffusion)

cd "$(dirname "$0")" || exit
tpus() {
  gcloud compute tpus queued-resources "$@" diffusion "${PLACE[@]}"
}

until gcloud storage ls "$LAST" 2>/dev/null; do
  if gcloud storage cat "$RUN.failed" 2>/dev/null; then
    echo "The pod still exists and is billed. Look at its log, then delete it and $RUN.failed."
    exit 1
  fi
  state=$(tpus describe --format='value(state.state)' 2>/dev/null)
  echo "$(date '+%F %T') ${state:-no pod}"
  case $state in
    '') tpus create "${POD[@]}" --service-account=ACCOUNT --metadata-from-file=startup-script=tpu_host.sh --async ;;
    FAILED | SUSPENDED) tpus delete --force --quiet ;;
  esac
  sleep 60
done
sleep 120 # the hosts upload the last logs
tpus delete --force --quiet
