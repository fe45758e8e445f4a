#pragma once

// All of fused_lars: the optimizers Lars (keyed by parameter id) and LARS (a torch::optim::Optimizer), the
// ops and the errors.

#include "fused_lars/errors.h"
#include "fused_lars/hyperparameters.h"
#include "fused_lars/lars.h"
#include "fused_lars/ops.h"
#include "fused_lars/optim.h"
