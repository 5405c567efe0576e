#include "error.h"

namespace odenet::cuda {

ODENET_ERROR_OF(Half, Half)
ODENET_ERROR_OF(BFloat16, BFloat16)

}  // namespace odenet::cuda
