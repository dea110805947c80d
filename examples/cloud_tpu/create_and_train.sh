#!/bin/bash
# Make a slice of TPU VMs, train on all of its hosts, and start again after whatever ends it:
#
#   PROJECT=mine ZONE=us-east5-b TYPE=v6e-16 SHARE=10.0.0.2:/runs JAXCP='/runs/jaxcp.whl[tpu]' \
#     examples/cloud_tpu/create_and_train.sh configs/mine.py mine --set mesh.data=2 mesh.seq=8
#
# It needs gcloud, signed in, a quota for the chips, and an NFS share (Filestore) in the same network:
# TPU VMs share no disk, and the folder of a run must be one that all hosts write to. A run that is
# given another one refuses to begin. JAXCP is what pip installs on each host.
# The same command runs on each host (--worker=all). jax asks the VM's metadata who the others are,
# which is all that --distributed needs. mesh.data x mesh.seq must be all chips, here 2 x 8.
# The run's file is copied to each host; what it reads lies on the share as well.
# A host that dies ends the others with code 75 after at most 30 s (--heartbeat). The loop starts all
# of them again, and the run goes on from its newest checkpoint, up to MOST times; it ends with 0
# when OUT/model is there. Where maintenance is coming, SIGTERM to jaxcp on any host saves within
# two steps on all of them.
# A spot slice that is taken away is gone: make it anew and run this again, nothing else is needed.
# The slice costs money until it is deleted: this script prints the command, and does not run it.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${TYPE:?}" "${SHARE:?}" "${JAXCP:?}"
NAME=${NAME:-jaxcp} VERSION=${VERSION:-v2-alpha-tpuv6e} MOST=${MOST:-20}
run=$1 out=/runs/$2
shift 2
options=${*:+$(printf ' %q' "$@")}

tpu() { gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }
everywhere() { tpu ssh "$NAME" --worker=all --command="$1"; }

tpu describe "$NAME" > /dev/null 2>&1 ||
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION"
echo "to delete it: gcloud compute tpus tpu-vm delete $NAME --project=$PROJECT --zone=$ZONE"

everywhere "sudo apt-get install -y nfs-common && sudo mkdir -p /runs &&
  (mountpoint -q /runs || sudo mount -t nfs $SHARE /runs) && pip install '$JAXCP'"
tpu scp "$run" "$NAME:run.py" --worker=all

for ((i = 0; i < MOST; i++)); do
  everywhere "jaxcp train run.py --out '$out' --distributed$options &&
    [ -e '$out/model/config.json' ]" && exit 0
  sleep 10
done
exit 1
