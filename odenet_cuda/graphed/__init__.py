"""Captured CUDA graphs: of a step or a grid (`loops.py`), and of a solve with its way back (`way_back.py`, `steps.py`)."""
