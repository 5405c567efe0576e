#include "error.h"

namespace odenet::cuda {

ODENET_ERROR_OF(float, float)

}  // namespace odenet::cuda
