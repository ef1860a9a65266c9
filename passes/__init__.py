"""Graph to graph. One pass, one file; the pipeline is one tuple."""
