"""The sub-commands of `plainsd`: small dataclasses whose fields are the flags. torch is imported in `run()` only."""
