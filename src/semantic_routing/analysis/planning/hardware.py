"""GPUs by their makers' data sheets, and the assumptions about a cluster, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, fields

from semantic_routing.training.metrics import PEAKS


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Nominal figures of a GPU, from its maker's data sheet."""

    peak: float
    """Dense bfloat16 FLOP/s (``training.metrics.PEAKS``)."""
    memory: float
    """Bytes of memory."""
    bandwidth: float
    """Bytes a second from and to that memory."""
    nvlink: float
    """Bytes a second that it sends to the other GPUs of its machine: half of the data sheet's sum of both ways."""


GPUS = {
    "A100": Gpu(peak=PEAKS["A100"], memory=80e9, bandwidth=2.039e12, nvlink=300e9),
    "H100": Gpu(peak=PEAKS["H100"], memory=80e9, bandwidth=3.35e12, nvlink=450e9),
    "H200": Gpu(peak=PEAKS["H200"], memory=141e9, bandwidth=4.8e12, nvlink=450e9),
    "B200": Gpu(peak=PEAKS["B200"], memory=180e9, bandwidth=8e12, nvlink=900e9),
}
"""GPUs on boards of eight (SXM), by name."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan assumes about a cluster; the defaults are assumptions too, with their sources."""

    utilisation: float = 0.4
    """Share of the peak FLOP/s that matrix products reach. Assumed; the metric ``mfu`` of one of your runs gives a
    better value."""
    usable_memory: float = 0.9
    """Share of a GPU's memory to plan with; the rest is for CUDA, workspaces and fragmentation. Assumed."""
    node: int = 8
    """GPUs per machine."""
    network_gb: float = 50.0
    """GB per second that a GPU sends to other machines: one 400 Gb/s adapter each."""
    start_us: float = 8.4
    """Microseconds to start a collective: NCCL's own model of a ring (src/graph/tuning.cc, baseLat, Simple)."""
    hop_us: float = 3.4
    """Microseconds of a ring's step inside a machine (the same, hwLat, NVLink)."""
    network_hop_us: float = 9.6
    """Microseconds of a ring's step between machines (the same, hwLat, network)."""
    host_gb: float = 50.0
    """GB per second from a GPU to host memory: PCIe 5 x16 transfers at most 64. Assumed."""
    decode_ms: float = 3.34
    """Milliseconds of one worker process per image: twice the 1.67 ms that two of them took together for 512x384
    JPEG to 256x256 (benchmarks/loader_speed.py, docs/log.md). Larger images take longer."""
    record_kb: float = 150.0
    """Kilobytes of an image with its caption in the shards. Assumed."""
    storage_node_gb: float = 2.0
    """GB per second between a machine and the shared storage. Assumed."""
    storage_gb: float = 40.0
    """GB per second of the shared storage in total. Assumed."""
    gpu_hours_per_failure: float = 16_384 * 54 * 24 / 419
    """GPU hours from one unexpected failure to the next: 419 in 54 days on 16,384 H100 (The Llama 3 Herd of Models,
    arXiv:2407.21783, Section 3.3.4)."""
    hang_share: float = 0.1
    """Share of failures in which no process crashes and all processes wait. Assumed, near the share of network
    failures there (8.4 %)."""
    restart_s: float = 180.0
    """Seconds from the end of all processes to the first byte read: scheduler, imports, process group. Assumed."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if name != "hang_share" and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("utilisation", "usable_memory", "hang_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")

    def nodes(self, gpus: int) -> int:
        """Return the number of machines; ValueError if the GPUs do not fill them."""
        if gpus > self.node and gpus % self.node:
            raise ValueError(f"{gpus} GPUs do not fill machines of {self.node}: give a multiple, or another --node")
        return max(1, gpus // self.node)

    def storage(self, nodes: int) -> float:
        """Return the bytes a second between the shared storage and all machines together."""
        return 1e9 * min(nodes * self.storage_node_gb, self.storage_gb)

    def link(self, gpu: Gpu, ranks: int, nodes: int) -> float:
        """Return the bytes a second of a ring through ``ranks`` GPUs on ``nodes`` machines.

        The adapters of a machine share the traffic of its GPUs that are in the ring.
        """
        if nodes == 1:
            return gpu.nvlink
        return min(gpu.nvlink, 1e9 * self.network_gb * max(1, ranks // nodes))

    def gather_seconds(self, size: float, gpu: Gpu, ranks: int, nodes: int) -> float:
        """Return the seconds of an all-gather to, or a reduce-scatter of, ``size`` bytes, in a ring."""
        if ranks == 1:
            return 0.0
        hops = (ranks - nodes) * self.hop_us + (nodes - 1) * self.network_hop_us
        moved = size * (ranks - 1) / ranks / self.link(gpu, ranks, nodes)
        return moved + 1e-6 * (self.start_us + hops)
