"""Small pictures, and archives of them."""

import io
import tarfile
import zipfile
from pathlib import Path

from PIL import Image


def picture(value: int = 0, form: str = "PNG", mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 8), value).save(stream, form)
    return stream.getvalue()


def pack(file: Path, *names: str, **texts: str | bytes) -> Path:
    """A .zip or .tar file of pictures of these names, the i-th of value i, and other files."""
    files = {name: picture(i) for i, name in enumerate(names)} | texts
    files = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return file
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file
