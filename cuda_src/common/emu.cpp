#include "emu_impl.h"
