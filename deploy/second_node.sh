#!/usr/bin/env bash
# Join a further machine to a model that TorchServe serves on the first one, and stay until told to end.
#
#   deploy/second_node.sh MODEL_CONFIG [CHECKPOINT]
#
# MODEL_CONFIG  a copy of the first machine's build/serve/model-config.yaml, which was written there by
#               `make serve NODES=2 MASTER=10.0.0.1:29500`. Its section torchrun must say nnodes, rdzv-backend: static
#               and rdzv-endpoint.
# CHECKPOINT    the converted folder on this machine, if it is not at the path in MODEL_CONFIG.
#
# NODE_RANK=1   which machine this is; the third one is 2.
# RDZV_ID       torchrun's --rdzv-id on the first machine: model name, underscore, initial_distribution_port of
#               config.properties (default: llama_29500).
# GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: the private network's interface, on both machines.
#
# Whichever side ends, the other cannot go on with half a model. The first machine's TorchServe starts its worker again
# by itself; the loop below does the same here, and both meet at rdzv-endpoint. The rendezvous backend is static because
# with c10d a rank of this machine could become rank 0, which must be TorchServe's.
#
# Rendezvous and gloo know no passwords and unpickle what they are sent: the network must be theirs alone.
set -u
: "${1:?usage: deploy/second_node.sh MODEL_CONFIG [CHECKPOINT]}"
config=$(realpath -m -- "$1") || exit 2
checkpoint=${2:+$(realpath -m -- "$2")}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

flags=$("$python" -m deploy.follow --torchrun "$config") || exit 2
running=
trap 'trap - TERM INT; [ -n "$running" ] && kill -TERM "$running" 2>/dev/null; wait; exit 0' TERM INT
while true; do
  # shellcheck disable=SC2086  # the flags are words
  "$python" -m torch.distributed.run $flags --node-rank "${NODE_RANK:-1}" --rdzv-id "${RDZV_ID:-llama_29500}" \
    --max-restarts 0 -m deploy.follow "$config" ${checkpoint:+"$checkpoint"} &
  running=$!
  wait "$running"
  echo "$(date '+%F %T') the ranks ended; joining again" >&2
  sleep 1
done
