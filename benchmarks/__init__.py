"""Side by side with what else there is: ``python -m benchmarks zero --help``.

``zero`` runs and takes turns, ``workers`` starts and asks processes, ``rank`` is what runs in one of them, ``subjects`` wraps
the model in each way, ``measure`` counts bytes and calls, ``table`` writes what was found, ``peers`` finds DeepSpeed.
"""
