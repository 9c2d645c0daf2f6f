"""FlexAttention on the patterns of `benchmarks.attention`; arguments: names, heads, KV heads, head dim, lengths."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch.nn.attention.flex_attention import (
    create_block_mask,
    flex_attention,
)

PATTERNS = {
    "causal": lambda b, h, i, j: i >= j,
    "window_4096": lambda b, h, i, j: (i >= j) & (i - j < 4096),
    "sink_128_window_4096": lambda b, h, i, j: (i >= j) & ((j < 128) | (i - j < 4096)),
    "sink_64_window_2048_stride_64x64": lambda b, h, i, j: (
        (i >= j) & ((j < 64) | (i - j < 2048) | ((j // 64) % 64 == 0))
    ),
}


def milliseconds(run, repeats: int = 5, calls: int = 3) -> float:
    samples = []
    run()
    torch.cuda.synchronize()
    time.sleep(1.0)  # as `common.milliseconds` lets the chip rest
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / calls)
    return statistics.median(samples)


def main(names: list[str], heads: int, kv_heads: int, dim: int, *lengths: int) -> None:
    attend, make_mask = torch.compile(flex_attention), torch.compile(create_block_mask)
    rows = []
    for length in lengths:
        make = lambda h, n=length: torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v, do = make(heads), make(kv_heads), make(kv_heads), make(heads).detach()
        for name in names:
            mask = make_mask(PATTERNS[name], None, None, length, length, device="cuda")
            run = lambda q=q, k=k, v=v, m=mask: attend(q, k, v, block_mask=m, enable_gqa=True)

            def forward(run=run):
                with torch.no_grad():
                    run()

            def both(run=run, do=do):
                run().backward(do)

            for label, timed in (("fwd", forward), ("fwd+bwd", both)):
                ms = milliseconds(timed)
                rows.append({"pattern": name, "length": length, "what": "flex", "pass": label, "ms": ms})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1].split(","), *map(int, sys.argv[2:]))
