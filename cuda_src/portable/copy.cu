#include "copy.cuh"
