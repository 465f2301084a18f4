"""What a run has read: under the same names `--resume` may find something else."""

from hashlib import sha256

Content = list[str]  # in words, and as a digest; a list, as JSON gives it back


def seen(words: str, *parts: object) -> Content:
    digest = sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return [words, digest.hexdigest()]
