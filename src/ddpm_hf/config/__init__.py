"""Options of every command: one dataclass field = one flag = one YAML key."""
