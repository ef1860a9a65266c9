"""What runs at step time: operators, collectives, the program executor, counters. Imports nothing of the others."""
