"""The content-addressed storage of Xet: xorbs, and the chunks of them that each file consists of, without HTTP.

The formats are those of the client (xet-core, `openapi/cas.openapi.yaml` and `xet_core_structures`). A xorb is a row of
chunks, each behind a header of 8 bytes; a shard lists files, each as a row of segments of xorbs, with its SHA-256. Names
are hashes that need BLAKE3, which the standard library lacks: they are believed, and a file's SHA-256 is what is checked.
"""

import hashlib
import struct
from dataclasses import dataclass

from tests.hub.store import HubError

HEADER, ENTRY, FOOTER = 48, 48, b"XETBLOB"
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Segment:
    """Chunks start..stop of a xorb, `size` bytes when they are unpacked."""

    xorb: str
    start: int
    stop: int
    size: int


def hex_of(name: bytes) -> str:
    """A name as addresses spell it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", name))


class XetStore:
    def __init__(self):
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Segment]] = {}
        self.names: dict[str, str] = {}  # SHA-256 -> name of the file

    def add_shard(self, shard: bytes) -> dict[str, bytes]:
        """Register the files of a shard; their contents by SHA-256. HubError if they are not what the shard says."""
        found, contents, place = {}, {}, HEADER
        while (name := shard[place : place + 32]) != BOOKEND:
            if len(name) < 32:
                raise HubError(400, "The shard ends before its list of files does")
            flags, count = struct.unpack_from("<II", shard, place + 32)
            place += ENTRY
            segments = []
            for _ in range(count):
                _, size, start, stop = struct.unpack_from("<IIII", shard, place + 32)
                segments.append(Segment(hex_of(shard[place : place + 32]), start, stop, size))
                place += ENTRY
            place += ENTRY * count * bool(flags & WITH_VERIFICATION)
            data = b"".join(self.unpacked(segment) for segment in segments)
            sha256 = hashlib.sha256(data).hexdigest()
            if flags & WITH_SHA256:
                if hex_of(shard[place : place + 32]) != sha256:
                    raise HubError(400, "A file of the shard does not have the SHA-256 that the shard gives")
                place += ENTRY
            found[hex_of(name)], contents[sha256] = segments, data
            self.names[sha256] = hex_of(name)
        self.files |= found
        return contents

    def unpacked(self, segment: Segment) -> bytes:
        if segment.xorb not in self.xorbs:
            raise HubError(400, f"The xorb {segment.xorb} was not uploaded")
        xorb = self.xorbs[segment.xorb]
        chunks = chunk_places(xorb)[segment.start : segment.stop]
        data = b"".join(unpack_chunk(xorb[start:stop]) for start, stop in chunks)
        if len(data) != segment.size:
            raise HubError(400, f"A segment of the xorb {segment.xorb} has {len(data)} bytes, not {segment.size}")
        return data

    def reconstruction(self, name: str, start: int, stop: int | None, url_of) -> dict:
        """How bytes start..stop of a file are made: segments, and where their bytes lie. `url_of` gives a xorb's address."""
        if name not in self.files:
            raise HubError(404, f"There is no file {name}")
        terms, places, offset, position = [], {}, None, 0
        for segment in self.files[name]:
            if position + segment.size > start and (stop is None or position < stop):
                offset = start - position if offset is None else offset
                chunks = chunk_places(self.xorbs[segment.xorb])[segment.start : segment.stop]
                part = {"start": segment.start, "end": segment.stop}
                terms.append({"hash": segment.xorb, "unpacked_length": segment.size, "range": part})
                fetch = {"range": part, "url": url_of(segment.xorb)}
                fetch["url_range"] = {"start": chunks[0][0], "end": chunks[-1][1] - 1}
                if fetch not in places.setdefault(segment.xorb, []):
                    places[segment.xorb].append(fetch)
            position += segment.size
        if start and not terms:
            raise HubError(416, f"The file has {position} bytes")
        return {"offset_into_first_range": offset or 0, "terms": terms, "fetch_info": places}


def chunk_places(xorb: bytes) -> list[tuple[int, int]]:
    """Where the chunks of a xorb lie, their headers with them."""
    places, place = [], 0
    while place < len(xorb) and not xorb.startswith(FOOTER, place):
        end = place + 8 + int.from_bytes(xorb[place + 1 : place + 4], "little")
        if xorb[place] != 0 or end > len(xorb):
            raise HubError(400, "This is no xorb")
        places.append((place, end))
        place = end
    return places


def unpack_chunk(chunk: bytes) -> bytes:
    scheme, size, packed = chunk[4], int.from_bytes(chunk[5:8], "little"), chunk[8:]
    if scheme == 0:
        data = packed
    elif scheme == 1:
        data = lz4_frame(packed)
    elif scheme == 2:  # bytes 0, 4, 8, ... first, then 1, 5, 9, ...
        groups, data, place = lz4_frame(packed), bytearray(size), 0
        for i in range(4):
            count = len(range(i, size, 4))
            data[i::4] = groups[place : place + count]
            place += count
    else:
        raise HubError(400, f"Chunks may be packed by schemes 0, 1 and 2, not {scheme}")
    if len(data) != size:
        raise HubError(400, f"A chunk has {len(data)} bytes, and its header says {size}")
    return bytes(data)


def lz4_frame(frame: bytes) -> bytes:
    """The content of an LZ4 frame (lz4_Frame_format.md); its checksums are passed over."""
    if frame[:4] != b"\x04\x22\x4d\x18":
        raise HubError(400, "This is no LZ4 frame")
    flags, data = frame[4], bytearray()
    place = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    while size := int.from_bytes(frame[place : place + 4], "little"):
        place += 4
        block = frame[place : place + (size & 0x7FFFFFFF)]
        if size >> 31:
            data += block
        else:
            _lz4_block(block, data)
        place += len(block) + 4 * bool(flags & 16)
    return bytes(data)


def _lz4_block(block: bytes, data: bytearray) -> None:
    """Append the content of a block, which may copy from what came before it."""
    place = 0

    def length(base: int) -> int:
        nonlocal place
        if base == 15:
            more = 255
            while more == 255:
                more = block[place]
                base, place = base + more, place + 1
        return base

    while place < len(block):
        token = block[place]
        place += 1
        count = length(token >> 4)
        data += block[place : place + count]
        place += count
        if place < len(block):
            distance = block[place] | block[place + 1] << 8
            place += 2
            count = length(token & 15) + 4
            piece = data[len(data) - distance : len(data) - distance + count]
            data += (piece * (count // len(piece) + 1))[:count]
