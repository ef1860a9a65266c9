#include "adamw.cuh"
