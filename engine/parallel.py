"""The ranks that serve one model together: process group, mesh, and rank 0's word to the others."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.config import ConfigError
from llama2 import ModelArgs, tensor_parallel_mesh_shape

# Followers wait for the next plan in a collective, for as long as nobody asks anything. A leader that dies closes
# its connections, which ends the wait at once; no time-out is needed for that.
IDLE_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is, as torchrun says; alone without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read torchrun's variables; this is the one place that does."""
        if "RANK" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            return cls(*(int(environment[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"RANK is set but {error} is wrong: start several ranks with torchrun") from None


def choose_device(device: str, launch: Launch) -> str:
    """The torch device for `auto`, `cpu` or `cuda`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but this machine or this torch has no CUDA; use 'cpu' or 'auto'")
    if launch.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"{launch.local_size} ranks on this machine need a GPU each, but there are {torch.cuda.device_count()}; "
            f"start at most that many here"
        )
    return f"cuda:{launch.local_rank}"


def _own_store(launch: Launch) -> dist.Store | None:
    """A rendezvous store that listens on the master's address only; None where torchrun's agent has one already.

    Left alone, rank 0 would listen on every interface, and what it is sent is trusted.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "MASTER_ADDR" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if launch.rank == 0:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen on {address}:{port} for the others: {error.strerror}; MASTER_ADDR and "
                "MASTER_PORT must name a free port of its machine"
            ) from None
    return dist.TCPStore(
        address,
        port,
        launch.size,
        is_master=launch.rank == 0,
        master_listen_fd=listener.detach() if listener else None,
    )


class Ranks:
    """This rank's place among the others; alone it has no process group at all."""

    def __init__(self, launch: Launch, device: str, args: ModelArgs) -> None:
        self.launch, self.device = launch, device
        self.tp: DeviceMesh | None = None
        self.kv: DeviceMesh | None = None
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        try:
            parts, replicas = tensor_parallel_mesh_shape(args, launch.size)
        except ValueError as error:
            raise ConfigError(f"{error}. Start that many ranks: torchrun --nproc-per-node N") from None
        if launch.size == 1:
            return
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            store = _own_store(launch)
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size)
        kind = device.partition(":")[0]
        self.tp = self.kv = init_device_mesh(kind, (launch.size,), mesh_dim_names=("tp",))
        if replicas > 1:
            self.kv = init_device_mesh(kind, (parts, replicas), mesh_dim_names=("kv", "replica"))["kv"]
        # Plans travel on the host: a follower must not spin on its GPU while it waits for work.
        self._control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    @property
    def leads(self) -> bool:
        """Whether this rank schedules and samples."""
        return self.launch.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.tp is not None

    def agree(self, what: str, settings: str) -> None:
        """Refuse to start when the ranks were given different settings, which would end in a hang."""
        if not self.several:
            return
        digest = int.from_bytes(hashlib.sha256(settings.encode()).digest()[:7], "big")
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self.launch.size)]
        dist.all_gather(digests, torch.tensor([digest]), group=self._control)
        different = [rank for rank, other in enumerate(digests) if other.item() != digests[0].item()]
        if different:
            raise ConfigError(f"{what} on rank(s) {different} differ from rank 0's: start all ranks with the same ones")

    def broadcast(self, numbers: torch.Tensor) -> None:
        """Rank 0 says, the others hear: the same tensor of whole numbers everywhere."""
        dist.broadcast(numbers, 0, group=self._control)

    def close(self) -> None:
        """Leave the process group."""
        if self.several and dist.is_initialized():
            dist.destroy_process_group()
