"""Three texts of different kinds from what every Debian machine has: docker_texts.py FOLDER."""
import pathlib
import re
import sys

MARK, SIZE_MAX, DOCUMENT_MIN = "<|endoftext|>", 300_000, 400


def read(path):
    return path.read_text(encoding="utf-8", errors="ignore")


def write(path, documents):
    text, size = [], 0
    for d in (d.strip() for d in documents):
        if len(d) < DOCUMENT_MIN or size > SIZE_MAX:
            continue
        text.append(d)
        size += len(d)
    path.write_text(MARK.join(text), encoding="utf-8")


def licences():
    folder = pathlib.Path("/usr/share/common-licenses")
    files = sorted(p for p in folder.iterdir() if not p.is_symlink())
    return [s for p in files for s in re.findall(r"(?s).{1,2500}(?:\n\n|\Z)", read(p))]


def descriptions():
    status = read(pathlib.Path("/var/lib/dpkg/status"))
    found = re.findall(r"(?ms)^Description: (.*?)(?=^\S)", status)
    clean = [re.sub(r"(?m)^ \.?", "", d) for d in found]
    return ["\n\n".join(clean[i:i + 4]) for i in range(0, len(clean), 4)]


def copyrights():
    files = sorted(pathlib.Path("/usr/share/doc").glob("*/copyright"))
    return [read(p)[:3000] for p in files[::3]]


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    write(out / "licences.txt", licences())
    write(out / "descriptions.txt", descriptions())
    write(out / "copyrights.txt", copyrights())
