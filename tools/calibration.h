// Texts that stand for what models are used on, for rounding quantized weights (rs_calibrate).
#pragma once
#include <string>
#include <vector>

extern const std::vector<std::string> calibration_texts;
