#include "../cuda_src/portable/linear.cuh"
