"""The one error of the configuration, which sends its reader to the page of all keys."""

from __future__ import annotations

PAGE = "docs/config.md"


class ConfigError(ValueError):
    """A configuration that cannot be used: the key, the cause, the way out, the nearest name, the page."""

    def __init__(self, key: str, cause: str, way_out: str = "") -> None:
        self.key = key
        """Dotted path of the key, the file's name when the file itself is at fault, or ''."""
        parts = [f"{key}: {cause}" if key else cause, way_out, f"See {PAGE}."]
        super().__init__(" ".join(part for part in parts if part))
