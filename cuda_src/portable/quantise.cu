#include "quantise.cuh"
