"""`ddpm-hf cache`."""

from __future__ import annotations

import time

from ..config.commands import CacheConfig


def cache(config: CacheConfig) -> None:
    """List the caches of decoded images, or remove some of them."""
    from ..data.cache import cache_root
    from ..data.cache_folder import list_caches, remove_cache
    from ..storage.files import describe_bytes

    root = cache_root(config.cache_dir)
    found = list_caches(root)
    if not config.prune:
        for entry in found:
            print(entry)
        print(f"{len(found)} caches of decoded images in {root}, {describe_bytes(sum(e.size for e in found))} in all.")
        return
    freed = 0
    for entry in found:
        days = (time.time() - entry.last_used) / 86400
        if not entry.is_complete if config.older_than is None else days >= config.older_than:
            is_removed = remove_cache(entry.folder)
            print(f"{'Removed' if is_removed else 'In use, kept'}: {entry}")
            freed += entry.size if is_removed else 0
    print(f"{describe_bytes(freed)} freed in {root}.")
