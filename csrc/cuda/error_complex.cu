#include "error.h"

namespace odenet::cuda {

ODENET_ERROR_OF(Complex<float>, float)
ODENET_ERROR_OF(Complex<double>, double)

}  // namespace odenet::cuda
