"""Copies of the record for people: W&B, TensorBoard, trackio.

The record itself is `metrics.jsonl` and `result.json`. Training announces a run (`follow`) and does nothing else. One
process per program (`python -m harness.mirror`) reads the files of the announced runs and copies them, so a service
that hangs, crashes or is slow cannot disturb training.
"""
