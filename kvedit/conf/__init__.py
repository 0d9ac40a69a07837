"""The packaged Hydra tree; run.yaml is its root. Nothing here is imported but by Hydra."""
