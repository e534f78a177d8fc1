"""What devices can do at most, by their vendors' sheets, and how much of it a plan counts on.

Peaks are of dense bfloat16 – vendors print twice as much, for weights with zeros in a pattern. Links and networks are
one way, a device; sheets print both ways together.
"""

import re
from dataclasses import dataclass

from anchor_attn.train.plan.tiles import Tile

MFU = 0.5  # of the dense layers, all that is no matrix product included: what good training runs report
FLASH_TILE = Tile(128, 128)
ATTENTION_MFU = 0.5  # of the tiles that a kernel computes: FlashAttention 2 on an A100, 3 on an H100, both phases


@dataclass(frozen=True)
class Device:
    """A kind of device, and the machine that it usually stands in.

    Attributes:
        name: what `--device` calls it.
        flops_per_s: peak of dense bfloat16 products; None where nobody says it.
        memory_bytes: its memory.
        memory_bytes_per_s: to and from that memory.
        link_bytes_per_s: received from devices of the same node.
        network_bytes_per_s: received from other nodes.
        node_devices: devices of a node.
        tile: of its attention kernels.
        source: of the figures.
    """

    name: str
    flops_per_s: float | None
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    node_devices: int = 8
    tile: Tile = FLASH_TILE
    source: str = ""


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        dense_flops_per_s: in the dense layers.
        attention_flops_per_s: in the tiles of attention.
        source: where they come from.
    """

    dense_flops_per_s: float
    attention_flops_per_s: float
    source: str


def _device(name: str, tflops: float, gb: float, tb_per_s: float, link_gb: float, network_gb: float,
            source: str, node_devices: int = 8) -> Device:  # fmt: skip
    sizes = (1e12 * tflops, 1e9 * gb, 1e12 * tb_per_s, 1e9 * link_gb, 1e9 * network_gb)
    return Device(name, *sizes, node_devices=node_devices, source=source)


NVIDIA = "https://www.nvidia.com/en-us/data-center"
DEVICES = {
    device.name: device
    for device in (
        # name, TFLOP/s, GB, TB/s, GB/s in the node, GB/s between nodes: a network card of 200 or 400 Gb/s a device
        _device("a100", 312, 80, 2.039, 300, 25, f"{NVIDIA}/a100"),
        _device("a100-40gb", 312, 40, 1.555, 300, 25, f"{NVIDIA}/a100"),
        _device("h100", 989, 80, 3.35, 450, 50, f"{NVIDIA}/h100"),
        _device("h100-pcie", 756, 80, 2.0, 64, 50, f"{NVIDIA}/h100"),
        _device("h200", 989, 141, 4.8, 450, 50, f"{NVIDIA}/h200"),
        _device("b200", 2250, 180, 8.0, 900, 50, f"{NVIDIA}/dgx-b200"),
        _device("gb200", 2500, 186, 8.0, 900, 50, f"{NVIDIA}/gb200-nvl72", node_devices=72),
        _device("l40s", 362, 48, 0.864, 32, 25, f"{NVIDIA}/l40s"),
        _device("mi300x", 1307, 192, 5.3, 448, 50, "https://www.amd.com/en/products/accelerators/instinct.html"),
    )
}

# torch.cuda.get_device_name, the most specific first: "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200".
NAMED_BY_TORCH = (
    (r"A100.*40GB", "a100-40gb"),
    (r"A100.*80GB", "a100"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100 80GB", "h100"),
    (r"H200(?! NVL)", "h200"),
    (r"GB200", "gb200"),
    (r"B200", "b200"),
    (r"L40S", "l40s"),
    (r"MI300X", "mi300x"),
)


def find_device(name: str) -> Device:
    """The device of a name.

        find_device("h100").flops_per_s    9.89e14

    Raises:
        ValueError: a name that the table lacks.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}; pass one of them.")
    return DEVICES[name]


def recognize_device(torch_name: str) -> Device | None:
    """The device that torch calls so; None for one that the table lacks, whose peak nobody then guesses.

    recognize_device("NVIDIA A100-SXM4-80GB").name    "a100"
    """
    known = (name for pattern, name in NAMED_BY_TORCH if re.search(pattern, torch_name))
    name = next(known, None)
    return None if name is None else DEVICES[name]


def expect_rates(device: Device, mfu: float = MFU, attention_mfu: float = ATTENTION_MFU) -> Rates:
    """Rates as shares of the peak.

    Raises:
        ValueError: a share that is not above 0 and at most 1.
    """
    for name, share in (("mfu", mfu), ("attention_mfu", attention_mfu)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {share}; pass 0.5 for half of the peak.")
    if device.flops_per_s is None:
        raise ValueError(f"device must have a known peak to take a share of, got {device.name!r}; measure its rates.")
    source = f"assumed: {100 * mfu:g} % of the peak in dense layers, {100 * attention_mfu:g} % in attention"
    return Rates(mfu * device.flops_per_s, attention_mfu * device.flops_per_s, source)
