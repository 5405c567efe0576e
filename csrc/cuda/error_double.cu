#include "error.h"

namespace odenet::cuda {

ODENET_ERROR_OF(double, double)

}  // namespace odenet::cuda
