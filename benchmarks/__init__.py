"""Figures, beside those of what else there is: ``python -m benchmarks --help``.

``zero`` runs and takes turns, ``workers`` starts and asks processes, ``rank`` is what runs in one of them, ``subjects`` wraps
the model in each way, ``measure`` counts bytes and calls, ``table`` writes what was found, ``peers`` finds DeepSpeed.

``memory`` is step time against peak: ``memory_bench`` takes turns, ``memory_points`` has the points and their processes,
``memory_rank`` is what runs in one, ``memory_table`` and ``memory_plot`` write. ``offload`` uses the same processes for what
waits on the host. ``experts`` takes turns with ``experts_rank``, and ``pipeline`` with ``pipeline_rank``, whose models are in
``pipeline_models``; its part without ranks is ``pipeline_predicted``. ``prefetch`` predicts, and runs nothing.
"""
