"""Read one epoch of a streamed corpus in a process that may take up just a little more memory than it has begun with.

    python under_a_limit.py SOURCE TOKENIZER LIMIT

prints the number of tokens read; ends with an error if the limit (bytes) was reached, or does not hold.
"""

from __future__ import annotations

import resource
import sys
from itertools import islice
from pathlib import Path

from cocomix.data.corpus import CorpusConfig, StreamingConfig
from cocomix.data.streaming import open_stream
from cocomix.data.tokenizer import load_tokenizer

BLOCK_SIZE, SHUFFLE_BLOCKS = 128, 256


def data_bytes() -> int:
    """Memory that this process has to itself, as RLIMIT_DATA counts it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def main(source: str, tokenizer: str, limit: int) -> None:
    config = CorpusConfig(source, streaming=StreamingConfig(shuffle_blocks=SHUFFLE_BLOCKS))
    stream = open_stream(config, load_tokenizer(tokenizer), [], block_size=BLOCK_SIZE, seed=0)
    blocks = iter(stream)
    read = len(list(islice(blocks, 2 * SHUFFLE_BLOCKS)))  # its threads run, its buffers are there
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + limit,) * 2)
    while stream._begin.epoch == 0:
        next(blocks)
        read += 1
    try:
        bytearray(2 * limit)
    except MemoryError:
        sys.stdout.write(f"{read * BLOCK_SIZE}\n")
    else:
        sys.exit("the limit does not hold")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
