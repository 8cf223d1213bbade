#include "../gpu.h"
