#include "../cuda_src/portable/adamw.cuh"
