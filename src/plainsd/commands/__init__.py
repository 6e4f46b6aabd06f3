"""The sub-commands of `plainsd`: one small dataclass each, whose fields are its flags. torch is imported in `run()` only."""
