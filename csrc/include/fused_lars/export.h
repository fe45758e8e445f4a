#pragma once

// What the shared library shows to programs; all else in it is hidden.
#define FUSED_LARS_API __attribute__((visibility("default")))
