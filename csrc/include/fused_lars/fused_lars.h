#pragma once

// All of fused_lars: the optimizers Lars (by parameter id) and LARS (over torch::optim), the ops and errors.

#include "fused_lars/errors.h"
#include "fused_lars/hyperparameters.h"
#include "fused_lars/lars.h"
#include "fused_lars/ops.h"
#include "fused_lars/optim.h"
