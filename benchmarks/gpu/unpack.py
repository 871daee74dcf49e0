"""Collect the pieces of pack.py that a command brought to the GPU machine, and unpack each set that is complete.

    python3 benchmarks/gpu/unpack.py [--from .carry] [--to /tmp/carried]

A set is unpacked to /tmp/carried/SET. Pieces are moved out of .carry/, so that those of the next command do not mix
with them.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tarfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path(".carry"))
    parser.add_argument("--to", type=Path, default=Path("/tmp/carried"))
    args = parser.parse_args()
    for line in unpack(args.source, args.to):
        print(line, flush=True)


def unpack(source: Path, store: Path) -> list[str]:
    """Move all pieces from `source` to `store`, and unpack every complete set. Returns a line about each set."""
    parts = store / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.[0-9]*/*")):
        shutil.move(file, parts / file.name)
    names = sorted({file.name.split(".")[0] for file in parts.iterdir()})
    return [_unpack_set(name, parts, store / name) for name in names]


def _unpack_set(name: str, parts: Path, target: Path) -> str:
    """Unpack a set to `target` if the checksum of its pieces is right. Returns a line that says whether it did."""
    pieces, checksum_file = sorted(parts.glob(f"{name}.part.*")), parts / f"{name}.sha256"
    checksum = hashlib.sha256()
    archive = parts / f"{name}.tar.xz"
    with archive.open("wb") as out:
        for piece in pieces:
            data = piece.read_bytes()
            checksum.update(data)
            out.write(data)
    if not checksum_file.exists() or checksum.hexdigest() != checksum_file.read_text().strip():
        archive.unlink()
        return f"{name}: not unpacked, since some pieces are missing or damaged; {len(pieces)} are here"
    work = target.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    for file in (*pieces, checksum_file, archive):
        file.unlink()
    return f"{name}: unpacked to {target}"


if __name__ == "__main__":
    main()
