#include "linear.cuh"
