# The tests of a cross build (tests/test-arm): those that a row of kernels can change.  They need no program and no real model.

find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp)
add_custom_target(arm_tests)
foreach(name test_graph test_drop test_types test_ulp test_memory test_model)
  add_executable(${name} ${name}.cpp $<TARGET_OBJECTS:rs_objects>)
  set_target_properties(${name} PROPERTIES CXX_EXTENSIONS OFF)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_include_directories(${name} SYSTEM PRIVATE ${NLOHMANN_JSON_INCLUDE_DIR})
  target_link_libraries(${name} PRIVATE rs_flags rs_needs GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE RS_EMULATED)
  add_dependencies(arm_tests ${name})
  # The real model takes minutes under emulation.
  gtest_discover_tests(${name} TEST_FILTER -minilm* DISCOVERY_TIMEOUT 60
    PROPERTIES TIMEOUT 300 ENVIRONMENT "RS_ISA=neon;RS_TEST_ISAS=neon scalar")
endforeach()

# A CPU of Armv8.0, without dot products: the NEON row must not be offered, and nothing outside of it may need them.
add_test(NAME without_dot_products COMMAND ${RS_ARM_EMULATOR} -cpu cortex-a72 $<TARGET_FILE:test_graph>
  --gtest_filter=session.*:linear.quantized*:flash_attn.large*)
set_tests_properties(without_dot_products PROPERTIES TIMEOUT 300 ENVIRONMENT "RS_TEST_ISAS=scalar")
