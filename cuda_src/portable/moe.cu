#include "moe.cuh"
