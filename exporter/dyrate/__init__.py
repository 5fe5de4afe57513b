"""DyRate's classifier, trained on a frozen model as in the paper, and the schedule that a static engine needs.

`python -m exporter.dyrate CHECKPOINT --questions FILE --out FILE` does both; `graphs.dyrate` is the reduction.
"""
